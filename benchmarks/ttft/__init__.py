"""How long until the first token, and how large is the KV cache?"""
