"""The method: encoders split by position, the prototype bridge, selection, alignment and the inference chain.

The ground floor of fedbridge. It never imports Flower and never opens a site's files.
"""
