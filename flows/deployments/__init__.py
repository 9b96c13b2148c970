"""The flows that the deployments of prefect.yaml name, a module each, and their forms."""
