"""What each retrieved passage is read as for a question: text, concepts at a rate, or not at all; within a budget."""
