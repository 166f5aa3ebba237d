"""Transforms: from a row as a dataset holds it to a row as `core.chat.messages.Chats` reads it."""
