"""What phenomena are made of: the arithmetic and the conversations that several of them share, or that one needs room for."""
