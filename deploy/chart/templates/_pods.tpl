{{/* Parts of pods that several have. */}}

{{/* How a process of ours is asked for its health: dict "root" $ "port" "metrics". */}}
{{- define "proxmox-csi.probes" -}}
{{- with .root.Values.livenessprobe -}}
livenessProbe:
  httpGet:
    path: /livez
    port: metrics
  initialDelaySeconds: {{ .initialDelaySeconds }}
  periodSeconds: {{ .periodSeconds }}
  timeoutSeconds: {{ .timeoutSeconds }}
  failureThreshold: {{ .failureThreshold }}
{{- end }}
{{- end }}

{{/* Arguments that all three commands have. */}}
{{- define "proxmox-csi.commonArgs" -}}
- "-v={{ .Values.logVerbosityLevel }}"
- --log-format={{ .Values.logFormat }}
{{- end }}

{{/* The volume of the configuration file. */}}
{{- define "proxmox-csi.configVolume" -}}
- name: cloud-config
  secret:
    secretName: {{ include "proxmox-csi.configSecret" . }}
    items:
      - key: {{ if .Values.existingConfigSecret }}{{ .Values.existingConfigSecretKey }}{{ else }}config.yaml{{ end }}
        path: {{ base .Values.configFile }}
{{- if eq .Values.mode "management" }}
- name: kubeconfig
  secret:
    secretName: {{ required "mode management: kubeconfig.existingSecret names the Secret with the tenant's kubeconfig" .Values.kubeconfig.existingSecret }}
    items:
      - key: {{ .Values.kubeconfig.key }}
        path: kubeconfig
{{- end }}
{{- end }}

{{- define "proxmox-csi.configMounts" -}}
- name: cloud-config
  mountPath: {{ dir .Values.configFile }}
  readOnly: true
{{- end }}

{{- define "proxmox-csi.kubeconfigMount" -}}
{{- if eq .Values.mode "management" -}}
- name: kubeconfig
  mountPath: /etc/kubernetes/tenant
  readOnly: true
{{- end }}
{{- end }}

{{/* Annotations of a pod; those of the values win: dict "root" $ "port" 8080 "ours" (dict …) "theirs" .Values.…podAnnotations. */}}
{{- define "proxmox-csi.podAnnotations" -}}
{{- $all := .ours }}
{{- if and .root.Values.metrics.enabled (eq .root.Values.metrics.type "annotation") }}
{{- $all = merge (dict "prometheus.io/scrape" "true" "prometheus.io/port" (toString .port)) $all }}
{{- end }}
{{- toYaml (merge (dict) (default .root.Values.podAnnotations .theirs) $all) }}
{{- end }}

{{/* One sidecar of the controller: dict "root" $ "name" "attacher" "args" (list …). */}}
{{- define "proxmox-csi.sidecar" -}}
{{- $values := index .root.Values.controller .name -}}
- name: csi-{{ .name }}
  image: "{{ $values.image.repository }}:{{ $values.image.tag }}"
  imagePullPolicy: {{ $values.image.pullPolicy }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  args:
    - "-v={{ .root.Values.logVerbosityLevel }}"
    - --csi-address=unix:///csi/csi.sock
    - --timeout={{ .root.Values.timeout }}
    - --leader-election
    {{- if eq .root.Values.mode "management" }}
    - --leader-election-namespace={{ .root.Values.kubeconfig.namespace }}
    - --kubeconfig=/etc/kubernetes/tenant/kubeconfig
    {{- end }}
    - --kube-api-qps=20
    - --kube-api-burst=40
    {{- range concat .args (default (list) $values.args) }}
    - {{ . | quote }}
    {{- end }}
  {{- with .env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    {{- toYaml (default (dict) $values.resources) | nindent 4 }}
  volumeMounts:
    - name: socket-dir
      mountPath: /csi
    {{- with include "proxmox-csi.kubeconfigMount" .root }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}
