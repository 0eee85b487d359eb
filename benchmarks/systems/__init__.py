"""One script a system. All take the same command line, and leave Parquet files of `uri`, `label_id` and `score`."""
