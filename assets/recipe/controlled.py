"""stub"""
def figures(*a): return {}
