"""Text and human labels: sources, formats and grain pipelines."""
