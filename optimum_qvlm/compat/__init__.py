"""Every touch of what other libraries keep private or change between releases: one function each, with its reason.

Nothing here is looked up before it is first used. A name that is gone by then is told in one sentence.
"""
