"""One file a step of the pipeline, and the wiring to Prefect, MLflow and DVC that they share."""
