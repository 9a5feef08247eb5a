"""Does it pay to decide for each question what passages are read as?"""
