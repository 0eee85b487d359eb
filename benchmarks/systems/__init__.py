"""Scripts, one for each system, with one command line. They write Parquet files of `uri`, `label_id` and `score`."""
