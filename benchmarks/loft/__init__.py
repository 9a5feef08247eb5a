"""Does retrieval with concepts answer a corpus as retrieval with text does, and which is better at equal cost?"""
