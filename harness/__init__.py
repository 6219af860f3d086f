"""What common.py and lab.py are made of, a file a subject. Scripts import from those two alone."""
