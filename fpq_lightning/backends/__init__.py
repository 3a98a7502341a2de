"""How packed layers compute: real low-bit products where the hardware has them, decoded weights elsewhere."""
