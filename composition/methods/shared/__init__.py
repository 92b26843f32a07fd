"""What several methods use: losses, orders, spectra.

What belongs here: functions of at least two methods. What does not: methods; files here are not discovered. May import what methods may.
"""
