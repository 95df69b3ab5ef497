"""`pyro-vae explore`: one HTML file to move through a run's latent space in, with the decoder's weights inside.

decoder    a decoder as data: layers and link
contents   all that the page knows of a pair and its test data
document   the file: page.html, page.css and page.js with the payload in them, which load nothing from outside
"""
