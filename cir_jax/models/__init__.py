"""Encoders as pure functions of their parameters, behind one `Backbone`."""
