// The pause program of the local cluster's pod sandboxes.
module yuan2.dev/local/pause

go 1.24.0
