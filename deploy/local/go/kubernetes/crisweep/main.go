// Command crisweep stops and removes every pod sandbox of a container runtime, so that its network
// rules, namespaces and mounts are released the way they were made.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	endpoint := flag.String("endpoint", "", "container runtime endpoint, unix:///path")
	timeout := flag.Duration("timeout", time.Minute, "time for the whole sweep")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	if err := sweep(ctx, *endpoint); err != nil {
		fmt.Fprintln(os.Stderr, "crisweep:", err)
		os.Exit(1)
	}
}

func sweep(ctx context.Context, endpoint string) error {
	connection, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := runtime.NewRuntimeServiceClient(connection)
	listed, err := list(ctx, client)
	if err != nil {
		return err
	}
	failures := make(chan error, len(listed.Items))
	var group sync.WaitGroup
	for _, sandbox := range listed.Items {
		group.Add(1)
		go func() {
			defer group.Done()
			if err := remove(ctx, client, sandbox.Id); err != nil {
				failures <- fmt.Errorf("pod %s/%s: %w", sandbox.Metadata.Namespace, sandbox.Metadata.Name, err)
			}
		}()
	}
	group.Wait()
	close(failures)
	for err := range failures {
		return err
	}
	return nil
}

// list asks until the runtime answers: one that has just started refuses for a moment.
func list(ctx context.Context, client runtime.RuntimeServiceClient) (*runtime.ListPodSandboxResponse, error) {
	for {
		listed, err := client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return listed, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func remove(ctx context.Context, client runtime.RuntimeServiceClient, id string) error {
	if _, err := client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
