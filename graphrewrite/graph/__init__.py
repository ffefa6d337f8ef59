"""The joint graph: its nodes and signature, differentiation, edit verbs, interpreter, expansion, verifier, text."""
