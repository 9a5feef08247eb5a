"""How does the HTTP server bear many users at once?"""
