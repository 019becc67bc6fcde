"""The prompt-template study: do gains hold across prompt templates?"""
