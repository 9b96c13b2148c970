"""The peers: their environments, and the work as they do it; none of it imports Plumbline."""
