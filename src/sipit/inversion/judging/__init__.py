"""All that decides whether a candidate is the observed token, and nothing of search, fitting or corpora."""
