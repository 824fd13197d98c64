"""The prompt from the state of its last token alone: a search whose judge is perfect."""
