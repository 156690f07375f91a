"""The colours of methods: told apart by people with the usual colour deficiencies, at least 3:1 against the page; shapes tell them apart too."""

LIGHT = ("#0060a8", "#c04a00", "#007a5a", "#a0307f", "#806000", "#5b4fc4", "#333333", "#8c1c2e", "#2f7d1f", "#1a7f96")
DARK = ("#6db8ff", "#ff9a5c", "#3ed6a8", "#f08ccb", "#e6cc3d", "#b3a6ff", "#dddddd", "#ff8a94", "#93d977", "#62d0e6")
GREY = "#767676"
PAGE = {"light": "#ffffff", "dark": "#14171c"}
TEXT = {"light": "#1b1f24", "dark": "#e6e8eb"}
MUTED = {"light": "#57606a", "dark": "#a0a8b2"}
