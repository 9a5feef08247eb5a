"""What does a query cost when passages come again?"""
