"""The "Training" page in TensorBoard: verdict, map, drill-down, comparison and passport of recorded runs.

The Python half answers requests about runs; the pages in `static/` draw the answers, and draw those that
`trainrt.plugin.report_html` embeds just the same. Nothing here needs TensorFlow.
"""
