"""How large are stored concepts, what do fewer bits cost, and how fast are they read?"""
