"""Searches layouts, and changes that make a recipe fit."""
