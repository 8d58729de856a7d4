"""What looks at whole models: what a step would take, a table of the stages, which features are reused, and pictures."""
