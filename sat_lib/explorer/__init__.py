"""Interactive exploration of attention maps.

view: from a source of maps and a state to pictures and numbers. widget: sliders in JupyterLab that make the state.
"""
