"""What do answers lose: by concepts, by how anchors are chosen, by each part of the training, in other texts?"""
