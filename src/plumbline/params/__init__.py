"""What an experiment may say: the schema, and the only reader of YAML."""
