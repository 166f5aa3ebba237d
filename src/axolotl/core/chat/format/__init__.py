"""How a message is written. Each module has `format_message(message, message_index=None)`: the message with the text that
its format puts around and between the parts.
"""
