"""Datasets in other forms than COCO: each is found, read, and written as COCO."""
