"""Conversations as data: messages made of parts, each with its own weight, and formats that write them as text.

In: rows as messages. Out: text, tokens and labels. `messages` holds the types; `format` one module per written form. One more
format is one more module there with `format_message(message, message_index)`.
"""
