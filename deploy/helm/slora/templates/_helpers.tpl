{{/* Labels by which a component's pods are found: (list $ "gateway"). They never change, or upgrades fail. */}}
{{- define "slora.selector" -}}
app.kubernetes.io/name: slora
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "slora.labels" -}}
{{ include "slora.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end }}

{{/* Name and labels of a component's object. */}}
{{- define "slora.metadata" -}}
name: {{ (index . 0).Release.Name }}-{{ index . 1 }}
labels: {{- include "slora.labels" . | nindent 2 }}
{{- end }}

{{- define "slora.image" -}}
{{- $ := index . 0 -}}
image: {{ printf "%s%s:%s" $.Values.image.prefix (index . 1) ($.Values.image.tag | default $.Chart.AppVersion) | quote }}
imagePullPolicy: {{ $.Values.image.pullPolicy }}
{{- end }}

{{/* Settings as environment variables: (list "ENGINE" settings). Whole numbers must not become 1.7e+10. */}}
{{- define "slora.settings" -}}
{{- $service := index . 0 -}}
{{- range $name, $value := index . 1 }}
{{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}{{ $value = int64 $value }}{{ end }}
- name: SLORA_{{ $service }}_{{ upper $name }}
  value: {{ toString $value | quote }}
{{- end }}
{{- end }}

{{/* What all services are told of logs and traces: (list $ "ENGINE"). */}}
{{- define "slora.telemetry" -}}
{{- $values := (index . 0).Values -}}
{{- $own := dict
    "log_format" $values.logFormat
    "otlp_endpoint" $values.tracing.endpoint
    "trace_sample_ratio" $values.tracing.sampleRatio -}}
{{ include "slora.settings" (list (index . 1) $own) }}
{{- end }}

{{/* Alive: the process answers. A loading engine and a draining service are, and must not be restarted for it. */}}
{{- define "slora.probes" -}}
{{- $port := index . 0 -}}
startupProbe:
  grpc: {port: {{ $port }}, service: liveness}
  # A large arena takes a while to be made.
  periodSeconds: 2
  failureThreshold: 300
livenessProbe:
  grpc: {port: {{ $port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: {{ $port }}{{ with index . 1 }}, service: {{ . }}{{ end }}}
  periodSeconds: 5
  timeoutSeconds: 3
{{- end }}

{{- define "slora.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* What every pod has: (list $ component user group). */}}
{{- define "slora.pod" -}}
{{- $ := index . 0 -}}
{{- $labels := include "slora.selector" . | fromYaml -}}
serviceAccountName: {{ $.Release.Name }}
automountServiceAccountToken: false
# A Service called slora-engine would be told as SLORA_ENGINE_…, which is how settings are told.
enableServiceLinks: false
{{- with $.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ index . 2 }}
  runAsGroup: {{ index . 3 }}
  fsGroup: {{ index . 3 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
topologySpreadConstraints:
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
    labelSelector: {matchLabels: {{ toJson $labels }}}
{{- end }}
{{- end }}

{{/* Where pods go: the values of a component with nodeSelector and tolerations. */}}
{{- define "slora.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Callers stop coming before SIGTERM does: endpoints take a moment to be forgotten everywhere. */}}
{{- define "slora.lifecycle" -}}
lifecycle: {preStop: {sleep: {seconds: {{ .Values.preStopSeconds }}}}}
{{- end }}

{{- define "slora.modelVolume" -}}
- name: model
{{- toYaml .Values.model.volume | nindent 2 }}
{{- end }}

{{- define "slora.modelPath" -}}
/model{{ with .Values.model.path }}/{{ . }}{{ end }}
{{- end }}

{{- define "slora.modelMount" -}}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}

{{- define "slora.secretName" -}}
{{ .Values.secrets.existing | default (printf "%s-secrets" .Release.Name) }}
{{- end }}

{{/* A variable from the Secret: (list $ variable key isRequired). What is not there is not set: an instance's role serves. */}}
{{- define "slora.secretVariable" -}}
- name: {{ index . 1 }}
  valueFrom:
    secretKeyRef: {name: {{ include "slora.secretName" (index . 0) }}, key: {{ index . 2 }}, optional: {{ not (index . 3) }}}
{{- end }}

{{/* A Secret's files: (list volume secret), or (list volume secret key) for one of them. A new one appears in its place. */}}
{{- define "slora.secretVolume" -}}
- name: {{ index . 0 }}
  secret:
    secretName: {{ index . 1 }}
    defaultMode: 0440
    {{- if gt (len .) 2 }}
    items: [{key: {{ index . 2 }}, path: {{ index . 2 }}}]
    {{- end }}
{{- end }}

{{/* What a service shows its callers, and asks of them: (list secret directory asks healthPort). Nothing without a Secret. */}}
{{- define "slora.serverTls" -}}
{{- $secret := index . 0 -}}
{{- $place := index . 1 -}}
tls_certificate: {{ empty $secret | ternary "" (printf "%s/tls.crt" $place) | quote }}
tls_key: {{ empty $secret | ternary "" (printf "%s/tls.key" $place) | quote }}
tls_client_ca: {{ or (empty $secret) (not (index . 2)) | ternary "" (printf "%s/ca.crt" $place) | quote }}
# Kubernetes' probes know no TLS.
health: {{ empty $secret | ternary "" (printf "0.0.0.0:%d" (int (index . 3))) | quote }}
{{- end }}

{{/* How a service calls another: (list $ peer component). */}}
{{- define "slora.callerTls" -}}
{{- $ := index . 0 -}}
{{- $peer := index . 1 -}}
{{- range $name, $file := dict "ca" "ca.crt" "certificate" "tls.crt" "key" "tls.key" }}
{{ $peer }}_{{ $name }}: {{ empty $.Values.tls.services | ternary "" (printf "/certificates/%s" $file) | quote }}
{{- end }}
{{ $peer }}_server_name: {{ empty $.Values.tls.services | ternary "" (printf "%s-%s" $.Release.Name (index . 2)) | quote }}
{{- end }}

{{- define "slora.secretChecksum" -}}
checksum/secrets: {{ toJson .Values.secrets | sha256sum }}
{{- end }}

{{/* The arena: shared memory of one pod, or of all pods of a node. */}}
{{- define "slora.arenaVolume" -}}
- name: arena
{{- if eq .Values.adapterStore.placement "node" }}
  hostPath: {path: /dev/shm, type: Directory}
{{- else }}
  # A little above the arena: there is half a MiB behind it.
  emptyDir: {medium: Memory, sizeLimit: {{ add (int64 .Values.adapterStore.arenaBytes) 16777216 | quote }}}
{{- end }}
{{- end }}

{{- define "slora.uploadVolume" -}}
- name: uploads
  emptyDir: {sizeLimit: {{ int64 .Values.adapterStore.uploadBytes | quote }}}
{{- end }}

{{- define "slora.diskCacheVolume" -}}
- name: disk-cache
  # A little above the budget: a file system counts in blocks. It outlives the container, not the pod.
  emptyDir: {sizeLimit: {{ add (int64 .Values.adapterStore.diskCacheBytes) 67108864 | quote }}}
{{- end }}

{{/* The store's container: a pod of its own, or beside an engine. */}}
{{- define "slora.storeContainer" -}}
name: adapter-store
{{ include "slora.image" (list . "adapter-store") }}
{{ include "slora.containerSecurity" . }}
ports:
  - {name: store-grpc, containerPort: 50052}
  - {name: store-metrics, containerPort: 9052}
env:
{{- include "slora.secretVariable" (list . "REDIS_PASSWORD" "redis-password" .Values.redis.bundled) | nindent 2 }}
{{- include "slora.secretVariable" (list . "AWS_ACCESS_KEY_ID" "s3-access-key" .Values.s3.bundled) | nindent 2 }}
{{- include "slora.secretVariable" (list . "AWS_SECRET_ACCESS_KEY" "s3-secret-key" .Values.s3.bundled) | nindent 2 }}
  - {name: AWS_DEFAULT_REGION, value: {{ .Values.s3.region | quote }}}
  # By its name it keeps its adapters over a restart; by its address the others, engines and gateways reach it.
  - {name: REPLICA_ID, valueFrom: {fieldRef: {fieldPath: {{ eq .Values.adapterStore.placement "node" | ternary "spec.nodeName" "metadata.name" }}}}}
  - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- $redis := printf "redis://:$(REDIS_PASSWORD)@%s-redis:6379/0" .Release.Name }}
{{- $s3 := printf "http://%s-s3:9000" .Release.Name }}
{{- $own := dict
    "listen" "0.0.0.0:50052"
    "metrics" "0.0.0.0:9052"
    "replica_id" "$(REPLICA_ID)"
    "advertise" "$(POD_IP)"
    "base_model" .Values.model.name
    "base_model_config" (include "slora.modelPath" .)
    "redis_url" (.Values.redis.bundled | ternary $redis .Values.redis.url)
    "s3_endpoint" (.Values.s3.bundled | ternary $s3 .Values.s3.endpoint)
    "s3_bucket" .Values.s3.bucket
    "arena_bytes" .Values.adapterStore.arenaBytes
    "arena_dir" "/arena"
    "upload_dir" "/uploads"
    "disk_cache_dir" (gt (int64 .Values.adapterStore.diskCacheBytes) 0 | ternary "/disk-cache" "")
    "disk_cache_bytes" .Values.adapterStore.diskCacheBytes
    "drain_seconds" .Values.adapterStore.drainSeconds
    "service_tokens" (empty .Values.auth.tokens | ternary "" "/tokens")
    "allow_anonymous" (not (or .Values.auth.tokens .Values.tls.services)) }}
{{- $own = merge $own (include "slora.serverTls" (list .Values.tls.services "/certificates" true 50058) | fromYaml) }}
{{- include "slora.settings" (list "ADAPTER_STORE" $own) | trim | nindent 2 }}
{{- include "slora.telemetry" (list . "ADAPTER_STORE") | trim | nindent 2 }}
{{- include "slora.settings" (list "ADAPTER_STORE" .Values.adapterStore.settings) | trim | nindent 2 }}
{{ include "slora.probes" (list (empty .Values.tls.services | ternary 50052 50058) "") }}
{{ include "slora.lifecycle" . }}
resources:
  # Pages of shared memory count as the store's, which touches them first.
  {{- $memory := add (int64 .Values.adapterStore.arenaBytes) (int64 .Values.adapterStore.workingBytes) | quote }}
  requests: {cpu: {{ .Values.adapterStore.cpu | quote }}, memory: {{ $memory }}}
  limits: {memory: {{ $memory }}}
volumeMounts:
  {{- include "slora.modelMount" . | nindent 2 }}
  - {name: arena, mountPath: /arena}
  - {name: uploads, mountPath: /uploads}
  {{- if .Values.adapterStore.diskCacheBytes }}
  - {name: disk-cache, mountPath: /disk-cache}
  {{- end }}
  {{- if .Values.tls.services }}
  - {name: certificates, mountPath: /certificates, readOnly: true}
  {{- end }}
  {{- if .Values.auth.tokens }}
  - {name: tokens, mountPath: /tokens, readOnly: true}
  {{- end }}
{{- end }}

{{/* The Secrets of a pod with a store, besides its certificates. */}}
{{- define "slora.tokenVolume" -}}
{{- with .Values.auth.tokens }}
{{- include "slora.secretVolume" (list "tokens" .) }}
{{- end }}
{{- end }}

{{- define "slora.certificateVolume" -}}
{{- with .Values.tls.services }}
{{- include "slora.secretVolume" (list "certificates" .) }}
{{- end }}
{{- end }}

{{/* The token with which a service calls the store: (list $ role). */}}
{{- define "slora.ownTokenVolume" -}}
{{- with (index . 0).Values.auth.tokens }}
{{- include "slora.secretVolume" (list "own-token" . (index $ 1)) }}
{{- end }}
{{- end }}

{{- define "slora.callerMounts" -}}
{{- if .Values.tls.services }}
- {name: certificates, mountPath: /certificates, readOnly: true}
{{- end }}
{{- if .Values.auth.tokens }}
- {name: own-token, mountPath: /own-token, readOnly: true}
{{- end }}
{{- end }}

{{- define "slora.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClass }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .storage }}}}
{{- end }}
