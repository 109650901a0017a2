"""Rows from wherever they are: a folder, a bucket, or a server; recorded, or being recorded."""
