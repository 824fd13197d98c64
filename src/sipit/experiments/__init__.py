"""Measurements that produce a record: each module one table or figure."""
