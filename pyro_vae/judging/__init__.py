"""Judging: how good any model/guide pair is, in numbers that carry their error."""
