"""Run folders in, pages out: `report.html` of one run, a comparison of several. In the installed package only."""
