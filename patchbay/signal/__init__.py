"""Signal: the typed address of one signal inside a model, and which positions of it are meant. Data only."""
