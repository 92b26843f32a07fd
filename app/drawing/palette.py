"""The colours of everything that is drawn."""

# Told apart by people who do not see red and green apart (Okabe and Ito 2008), the prompt alone in grey.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#6a3d9a")
GREY = "#888888"
PAPER, INK, FAINT = "#ffffff", "#1b1b1b", "#6b6b6b"
