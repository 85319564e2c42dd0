"""Rendered practice faces: who is drawn (identity), what moves (anatomy, timeline), how it is drawn (render), what a
data set of them holds (plan). ``data.rendering.sample`` lays them out as Aff-Wild2 does.
"""
