"""The HTTP server: documents, answers, chats, an OpenAI-compatible API and a page, over the namespaces of a storage."""
