"""Models that policies and authors think with: Claude, and models behind any OpenAI-compatible endpoint.

Requests and answers are plain JSON in the form of Anthropic's Messages API. What differs between providers is in
:mod:`anthropic` and :mod:`openai`, whose packages are imported when a call is made and not before.
"""
