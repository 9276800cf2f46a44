"""Glue to PEFT's file format. Imported only when used."""
