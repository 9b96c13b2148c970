"""Speed and memory of Plumbline beside its peers, in turns and in processes of their own."""
