"""What keeps an export small: tensors written as they are made, those on disk that need not lie in memory."""
