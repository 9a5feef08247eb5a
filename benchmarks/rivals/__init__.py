"""What else could fill as many positions?"""
