"""What a results folder says: rankings and queries over its Parquet files, without torch.

`python -m analysis --help` in a terminal; in Python `analysis.load.load_table`, `analysis.query.query` and
`analysis.rank.rank`. Nothing is imported here, so that help comes at once.
"""
