"""Text of strangers on a terminal: nothing of it moves the cursor or colours anything."""


def printable(text: str) -> str:
    """Text from a file or a flag without what could move the cursor or colour a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
